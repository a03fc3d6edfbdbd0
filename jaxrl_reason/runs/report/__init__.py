"""report.html of a run and comparison.html of a comparison: one file each, without network, server or foreign scripts.

`curves` thins metrics to curves, `completions` chooses sampled completions, `run` and `comparison` put the content
together, and `page` writes it into page.html, which draws it in the browser.
"""

from jaxrl_reason.runs.report.comparison import write_comparison
from jaxrl_reason.runs.report.run import Report, report_of
