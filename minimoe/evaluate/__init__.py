"""What can the model do? Scores with chance level and interval, and a report of them (chapter 11)."""
from minimoe.evaluate.benchmark import Benchmark, Measured, benchmark
from minimoe.evaluate.likelihood import loglikelihoods, rolling_loglikelihoods
from minimoe.evaluate.results import Result, Scores, interval
from minimoe.evaluate.tasks import evaluate

__all__ = ["Benchmark", "Measured", "Result", "Scores", "benchmark", "evaluate", "interval", "loglikelihoods", "rolling_loglikelihoods"]
