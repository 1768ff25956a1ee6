"""What a rank reports about a hang."""
