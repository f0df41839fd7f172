"""From the texts beside web images to the anchors of CAPro."""
