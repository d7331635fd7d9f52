"""onnxdp: trained ONNX models made much smaller, run by stock ONNX Runtime."""
