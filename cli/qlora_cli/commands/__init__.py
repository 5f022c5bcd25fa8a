"""The commands: one file a command, with its options. Each imports what it runs when it is called."""
