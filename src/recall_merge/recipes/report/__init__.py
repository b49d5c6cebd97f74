"""Reports: what a merge, a workspace or a bench has to show, gathered from what they keep, as pages of `recall_merge.report`."""
