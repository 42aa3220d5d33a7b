"""Types that every room uses: samples, layouts, batches, masks, losses, noise."""
