"""What everything else stands on: files that are written whole, messages, figures, timing."""
