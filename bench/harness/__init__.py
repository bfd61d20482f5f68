"""What the benches share: who takes turns, in which processes, on what machine; peaks, records, tables, commands."""
