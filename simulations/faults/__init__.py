"""What goes wrong.

* `schedule.py`     faults at given times, as scenarios list them, and how each is put right again
* `draw.py`         a schedule drawn from the seed
* `buggify.py`      what is legal but rare, often
* `adversaries.py`  who lies, and how
"""
