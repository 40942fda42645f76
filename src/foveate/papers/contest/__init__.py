"""Attentions trained alike on tasks that need far tokens; `foveate recall` is the command."""
