"""What the scripts share; each file one subject."""
