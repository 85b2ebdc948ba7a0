"""What can the model do? Scores with chance level and interval, and a report of them (chapter 11)."""
from minimoe.evaluate.benchmark import Benchmark, Measured, benchmark
from minimoe.evaluate.likelihood import loglikelihoods, rolling_loglikelihoods
from minimoe.evaluate.results import Result, Scores, interval, table
from minimoe.evaluate.tasks import during_training, evaluate

__all__ = ["Benchmark", "Measured", "Result", "Scores", "benchmark", "during_training", "evaluate", "interval", "loglikelihoods",
           "rolling_loglikelihoods", "table"]
