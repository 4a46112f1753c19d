"""Forecasts of parameters, memory and time, before anything is trained. Imports no torch."""
