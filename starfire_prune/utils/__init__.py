"""What the other rooms share: files, text, modules, settings, errors."""
