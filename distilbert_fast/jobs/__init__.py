"""What commands run, stage by stage. In what distillations differ, job.py says; one job a file."""
