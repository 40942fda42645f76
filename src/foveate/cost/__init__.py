"""What attention costs before anyone runs it: tiles of neighborhoods, ranks of a long context."""
