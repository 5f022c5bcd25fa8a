"""Run the operator on such a cluster: jobs, scripted pods, faults and recorded histories."""
