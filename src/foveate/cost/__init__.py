"""What attention costs before anyone runs it: `foveate cost tiles` for neighborhoods."""
