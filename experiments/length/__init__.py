"""Length generalisation: tasks learned on short sequences and tested on long ones."""
