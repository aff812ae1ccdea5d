"""The targets that come with accelkit; each is found by its entry point, as anyone's are."""
