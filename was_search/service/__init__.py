"""What people type and call: options, commands, steps and reports. It uses all packages; none of them imports it."""
