"""What `distilbert-fast distill` can do: one job a file. What a job is, job.py says."""

from distilbert_fast.distill_jobs.job import STUDENT, Job, Metric, Variant
from distilbert_fast.distill_jobs.mlm import MlmJob
from distilbert_fast.distill_jobs.qa import QaJob
from distilbert_fast.distill_jobs.task import RegressionJob, TaskJob
from distilbert_fast.distill_jobs.tokens import TokensJob

__all__ = ["STUDENT", "Job", "Metric", "MlmJob", "QaJob", "RegressionJob", "TaskJob", "TokensJob", "Variant"]
