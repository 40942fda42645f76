"""Tasks that small models are trained on: recall, copying, needle, and text byte by byte."""

from foveate.papers.tasks.base import IGNORED, Batch, Task
from foveate.papers.tasks.copying import Copying
from foveate.papers.tasks.needle import Needle
from foveate.papers.tasks.recall import Recall
from foveate.papers.tasks.text import ByteText, standard_library, text_file

__all__ = [
    "IGNORED", "Batch", "ByteText", "Copying", "Needle", "Recall", "Task", "standard_library",
    "text_file",
]  # fmt: skip
