"""Economic figures of a window from the ledger, each as SQL that anybody can run by hand."""
