"""What a report is made of: runs sorted into settings, settings compared, tables, figures and the page."""
