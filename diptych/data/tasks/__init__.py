"""Tasks: functions from one sample to another."""
