"""What can the model do? Scores with chance level and interval, and a report of them (chapter 11)."""
from minimoe.evaluate.benchmark import Benchmark, Measured, benchmark
from minimoe.evaluate.likelihood import loglikelihoods, rolling_loglikelihoods
from minimoe.evaluate.report import comparison, write_report
from minimoe.evaluate.results import Result, Scores, interval, table
from minimoe.evaluate.tasks import during_training, evaluate, from_file
from minimoe.evaluate.text import with_text

__all__ = ["Benchmark", "Measured", "Result", "Scores", "benchmark", "comparison", "during_training", "evaluate", "from_file", "interval",
           "loglikelihoods", "rolling_loglikelihoods", "table", "with_text", "write_report"]
