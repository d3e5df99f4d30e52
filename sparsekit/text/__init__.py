"""Token rows: sources of text, calibration, evaluation and training rows."""
