"""What the example experiments share."""
