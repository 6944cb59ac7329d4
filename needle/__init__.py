"""Needle: a laboratory for distilling a large model's tool calling into a student of about 26M parameters."""

__version__ = "0.1.0"
