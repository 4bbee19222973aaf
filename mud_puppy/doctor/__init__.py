"""`mud-puppy doctor`: what is installed, what works, what was set and why, and what to do.

`facts` reads files; `probe` tries the device in a process of its own, which `watch` starts;
`faults` judges both, without looking at the machine again; `render` writes it down.
"""
