"""Pure scheduling: integers in, integers out. No clock, thread, socket or array library."""
