"""Programs, one absl program each, configured by frozen dataclasses."""
