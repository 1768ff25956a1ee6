"""What is done with runs that were sent: choose among them, wait for them, compare and remove them."""
