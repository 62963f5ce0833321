"""What steering does elsewhere: to questions that are none of its business."""
