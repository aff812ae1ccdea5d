"""A third party's pass and backend for accelkit."""
