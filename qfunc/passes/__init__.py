"""Pure passes: functions from graph to graph, one verb a file."""
