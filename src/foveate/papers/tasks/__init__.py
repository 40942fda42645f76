"""Tasks that small models are trained on.

Recall, copying and needle are drawn; text is learnt byte by byte; texts are told by their labels.
"""

from foveate.papers.tasks.backcopy import Backcopy
from foveate.papers.tasks.base import IGNORED, Batch, Task
from foveate.papers.tasks.classification import Classification
from foveate.papers.tasks.copying import Copying
from foveate.papers.tasks.filler import FillerRecall
from foveate.papers.tasks.labelled import Labelled, load
from foveate.papers.tasks.laundry import Laundry
from foveate.papers.tasks.needle import Needle
from foveate.papers.tasks.recall import Recall
from foveate.papers.tasks.repeated import Repeated
from foveate.papers.tasks.text import ByteText, standard_library, text_file

__all__ = [
    "IGNORED", "Backcopy", "Batch", "ByteText", "Classification", "Copying", "FillerRecall",
    "Labelled", "Laundry", "Needle", "Recall", "Repeated", "Task", "load", "standard_library",
    "text_file",
]  # fmt: skip
