"""The command `starfire`: options and messages; what it does is in the packages below."""
