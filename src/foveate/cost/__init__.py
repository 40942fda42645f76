"""What attention costs before anyone runs it.

`foveate cost decode`, `memory` and `afd` for language models, `foveate cost tiles` for
neighborhoods.
"""
