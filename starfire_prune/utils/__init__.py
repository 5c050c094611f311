"""Helpers that the other folders share: files, text, modules, settings, errors."""
