"""What attention costs before anyone runs it.

`foveate cost decode`, `memory` and `afd` for language models, `context` for ranks of a long
context, `tiles` for neighborhoods.
"""
