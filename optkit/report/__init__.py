"""The record of a trial and its forms: JSON, tables, CSV, a page, and many runs beside each other."""
