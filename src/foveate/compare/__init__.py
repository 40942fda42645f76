"""The main job: measure attentions on the user's model and text, and say which one to use.

`foveate compare` is `command.py`; `run.compare(options)` is the same from Python.
"""
