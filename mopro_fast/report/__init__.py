"""``mopro-fast report``: one HTML page that shows what a run did."""
