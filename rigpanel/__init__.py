"""rigpanel: the control panel for a shared GPU rig."""

__version__ = "0.1.0"
