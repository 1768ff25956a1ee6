"""What a rank does for somebody who looks inside: a debugger, and a profile."""
