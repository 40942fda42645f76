"""Rectified SpaAttn: block-sparse attention with its bias corrected (arXiv 2511.19835)."""

from foveate.methods.rectified_spaattn.method import RectifiedSpaAttn

__all__ = ["RectifiedSpaAttn"]
