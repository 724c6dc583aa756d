"""What an engine does by itself: see each module's --help."""
