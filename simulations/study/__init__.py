"""Many runs, and what is left of them on disk.

* `results.py`  a folder for each run: manifest, figures, Parquet; read back as it was written
* `sweep.py`    seeds and parameters over all cores, or over a Dask cluster
* `shrink.py`   the smallest schedule of faults that still breaks a promise
* `plots.py`    figures with confidence bands, as PNG and SVG
* `report.py`   one HTML file that needs nothing else
"""
