"""Using what was trained: chat in a program or a terminal, scores, predictions over a data set, export to one model folder."""
