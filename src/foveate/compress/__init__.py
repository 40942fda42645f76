"""Making a trained model smaller and faster by training it a little: `foveate compress`."""
