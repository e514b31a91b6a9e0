"""Properties: functions of an implementation, for the true one and for wrong ones."""
