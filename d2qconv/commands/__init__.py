"""The commands, one module for each group of them. Each adds itself to the app by its `add`."""
